"""What `TopKGKDTrainer` is made of: its configuration, its rows, its teachers, and the texts that the student writes."""
