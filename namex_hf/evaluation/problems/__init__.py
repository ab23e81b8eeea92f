"""Problems that models answer by generation, and checks of the answers, a file a kind."""
