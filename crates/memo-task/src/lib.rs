//! memo-task
