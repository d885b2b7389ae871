"""What commands write for readers: pages, and pictures that only experiments make."""
