"""Files that start a run on many accelerators: one description of the job, one writer for each launcher."""
