"""RWKV-7's recurrence in Pallas for TPUs."""
