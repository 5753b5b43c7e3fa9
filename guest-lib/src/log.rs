//! One atomic change of several words of pod memory.
