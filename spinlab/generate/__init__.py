"""Text from an artefact.

sampling   how tokens are chosen
writer     prompts, or a conversation, continued with a model
"""
