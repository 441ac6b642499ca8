"""Problems with known solutions, and what else tests share."""
