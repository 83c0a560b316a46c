"""The Engine protocol and its two implementations, `genai` and `stepwise`."""
