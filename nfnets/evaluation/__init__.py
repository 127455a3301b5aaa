"""How good trained networks are: logits of a whole split, measures of them, comparisons, reports, features. Knows no flags."""
