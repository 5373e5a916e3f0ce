"""Features of a dataset by a frozen encoder, heads that are trained on them, and their predictions.

A `FeatureBank` stores features of samples, a `Recipe` describes probes, and `Predictions` are their results: see
`probes.predict` for stored features, and `attentive_online.predict_online` for features that
are computed for each training step and then discarded.
"""
