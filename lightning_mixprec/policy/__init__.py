"""Who gets which format: rules and policies, resolved against a model's names. Decides; touches no tensor."""
