"""`trl-distill doctor`: look at a recipe before anything is launched. Reads configurations, tokenizers and data; never weights."""
