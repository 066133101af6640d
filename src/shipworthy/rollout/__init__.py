"""The only writer of plans: takes intents, steps rollouts, publishes what the gateway obeys."""
