"""What happens to pixels outside a model: reading, fitting, masks, pasting back, writing."""
