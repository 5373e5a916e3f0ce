"""The features that a frozen encoder computes for a dataset, heads that are trained on them, and their predictions.

A `FeatureBank` stores features of samples, a `Recipe` describes probes, and `Predictions` are the results of probes.
`probes.predict` trains probes on stored features. `attentive_online.predict_online` trains them on features that are
computed for each training step and then discarded.
"""
