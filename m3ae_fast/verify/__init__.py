"""Golden files of the official implementation, replayed on this one."""
