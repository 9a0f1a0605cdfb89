"""Linear attention in Pallas for TPUs."""
