//! The layout of pod memory and of every message.
#![no_std]
