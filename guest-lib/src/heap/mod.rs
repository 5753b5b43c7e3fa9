//! A heap in a segment.
