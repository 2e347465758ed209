"""Running scenarios: steps, retries, judgement, reports."""
