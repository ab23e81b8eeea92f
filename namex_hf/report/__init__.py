"""What a run reports: the record, the table, the model card."""
