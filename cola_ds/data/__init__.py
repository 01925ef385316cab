"""Datasets: where rows come from, how they become token ids, and how those become batches."""
