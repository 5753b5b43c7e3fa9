//! Data structures in a heap, for any number of nodes.
