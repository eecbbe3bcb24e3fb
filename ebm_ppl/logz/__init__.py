"""Estimators of log Z beside SMC; each is a settings object that `ebm_ppl.log_z` takes as its method."""
