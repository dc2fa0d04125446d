"""AdaMSS: Adaptive Multi-Subspace Approach for Fine-Tuning (https://neurips.cc/virtual/2025/poster/119606)."""
