"""On-policy GRPO: `loop` is the program, `rollout` and `learner` are the halves of its step."""
