"""Files that start a run on machines with many accelerators: one description of the job, one writer for each launcher."""
