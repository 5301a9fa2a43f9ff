"""How good and how costly a policy is: tasks (`tasks`), the grid that runs them (`grid`), and what single commands need."""
