"""What a run keeps on the disk, and goes on from."""
