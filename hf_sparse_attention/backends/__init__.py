"""The backends: each a module with `NAME`, `GEOMETRIES`, `available()`, `supports()` and `run()`."""
