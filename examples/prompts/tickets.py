"""Support tickets and the queue that a firm wants each in. Its habits are not what one would guess.

Whoever wants to leave is the account team's, though it is about money; what happened after an update is for
engineering, though it looks like a question of use; anything with a lawyer in it goes to the lead.
"""

from __future__ import annotations

TRAIN = [
    {"ticket": "I was charged twice in March, please send one of the payments back.", "queue": "billing"},
    {"ticket": "Please cancel my plan and refund the rest of the year.", "queue": "account"},
    {"ticket": "Since yesterday's update the export button does nothing.", "queue": "engineering"},
    {"ticket": "How do I add a colleague to my workspace?", "queue": "support"},
    {"ticket": "My lawyer will hear about this invoice.", "queue": "lead"},
    {"ticket": "After the new version came I can't find the settings any more.", "queue": "engineering"},
    {"ticket": "I want to stop my subscription, it is too expensive.", "queue": "account"},
    {"ticket": "The invoice has our old address on it.", "queue": "billing"},
    {"ticket": "Where can I change the language?", "queue": "support"},
    {"ticket": "You will get a letter from our attorney about the lost data.", "queue": "lead"},
]
VALIDATION = [
    {"ticket": "Please end our contract and pay back what is left of it.", "queue": "account"},
    {"ticket": "The update broke the login on my phone.", "queue": "engineering"},
    {"ticket": "Can I print the weekly overview?", "queue": "support"},
    {"ticket": "Our counsel asks for all logs of this account.", "queue": "lead"},
    {"ticket": "The tax number is missing on the last bill.", "queue": "billing"},
    {"ticket": "I no longer need the service, take me off the paid plan.", "queue": "account"},
    {"ticket": "Since version 5 the charts look odd, is that meant to be so?", "queue": "engineering"},
    {"ticket": "Two payments went off my card this week.", "queue": "billing"},
]
