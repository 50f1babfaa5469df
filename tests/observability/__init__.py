"""What watches: alerts fire when they should, and what dashboards ask has an answer."""
