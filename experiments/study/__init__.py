"""What the studies ask of trained networks: claims from several seeds, confidence, cells of the benchmark."""
