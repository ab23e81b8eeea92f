"""What a model is worth: tasks, runs, stored results, statistics and tables."""
