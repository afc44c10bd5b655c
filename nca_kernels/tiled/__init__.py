"""What backends share that run kernels of their own over tiles of cells."""
