"""Fine-tuning after surgery: losses against a teacher, and a training loop that resumes exactly."""
