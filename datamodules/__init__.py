"""What the data is: records, readers, batches and the multi-task schedule. Imports nothing of the project's other packages."""
