"""What an output says about itself: report, plots and model card, from what was measured and nothing else."""
