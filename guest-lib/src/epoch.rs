//! Memory that is freed only when nobody alive can still read it.
