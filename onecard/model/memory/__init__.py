"""What a run will need: the estimate, the plan that fits a card, its report."""
