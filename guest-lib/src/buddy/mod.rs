//! Large chunks, from a buddy allocator that any survivor can finish for a dead owner.
