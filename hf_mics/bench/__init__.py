"""How is communication measured across hosts? A virtual cluster with slow links, and what runs on it."""
