"""What the data is: records, readers, batches and the multi-task schedule. Imports none of the other packages."""
