"""Every query sees every key: keys are summed into a state, which is read out; both gradients."""
