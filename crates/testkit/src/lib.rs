//! Development only: finite differences, comparisons with tolerances, tiny models.
