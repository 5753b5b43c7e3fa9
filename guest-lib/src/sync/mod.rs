//! What threads of several nodes wait for, besides locks.
