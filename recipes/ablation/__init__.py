"""The paper's ablation (Table 5) and networks of equal size beside it, on data at hand."""
