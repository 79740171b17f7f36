"""What any numerical library needs: arrays, devices, files, threads, compilation, progress."""
