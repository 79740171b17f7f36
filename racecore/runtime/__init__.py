"""The base of any numerical library: arrays, devices, files, threads, compilation, progress."""
