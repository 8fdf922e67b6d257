//! Short answers against a reference, as SQuAD counts them (Rajpurkar et al. 2016, section 6.1,
//! <https://arxiv.org/abs/1606.05250>; the rule for empty answers is that of the evaluation script of SQuAD 2.0).

use std::collections::HashMap;

/// `text` as answers are compared: lower case, without ASCII punctuation and without the words a, an and the, words one
/// space apart.
pub fn normalize_answer(text: &str) -> String {
    let lower = text.to_lowercase();
    let plain: String = lower.chars().filter(|c| !c.is_ascii_punctuation()).collect();
    // An article is a whole run of letters and digits, also where a dash or quote that is not ASCII stands beside it.
    let mut kept = String::with_capacity(plain.len());
    let mut rest = plain.as_str();
    while let Some(first) = rest.chars().next() {
        let end = rest.find(|c: char| c.is_alphanumeric() != first.is_alphanumeric()).unwrap_or(rest.len());
        let (run, behind) = rest.split_at(end);
        kept.push_str(if matches!(run, "a" | "an" | "the") { " " } else { run });
        rest = behind;
    }
    kept.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether `answer` and `reference` are equal once [normalised](normalize_answer).
pub fn exact_match(answer: &str, reference: &str) -> bool {
    normalize_answer(answer) == normalize_answer(reference)
}

/// The harmonic mean of precision and recall over [normalised](normalize_answer) words, each counted as often as it
/// stands in both; in 0 to 1. Where one side has no words it is 1 if the other has none either, else 0.
pub fn f1(answer: &str, reference: &str) -> f64 {
    let (answer, reference) = (normalize_answer(answer), normalize_answer(reference));
    let (answer, reference): (Vec<_>, Vec<_>) = (answer.split(' ').collect(), reference.split(' ').collect());
    // Where there are no words, `split` gives one empty word: equal to that of another empty text, and to no other.
    let mut left: HashMap<&str, usize> = HashMap::new();
    for word in &reference {
        *left.entry(word).or_default() += 1;
    }
    let mut same = 0;
    for word in &answer {
        if let Some(count) = left.get_mut(word).filter(|count| **count > 0) {
            *count -= 1;
            same += 1;
        }
    }
    2.0 * f64::from(same) / (answer.len() + reference.len()) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_count_is_taken_off() {
        for (text, expected) in [
            ("The cat.", "cat"),
            ("  An  apple,\ta\nday ", "apple day"),
            ("theatre another banana", "theatre another banana"),
            ("U.S. state-of-the-art", "us stateoftheart"),
            ("\u{201c}The end\u{201d}", "\u{201c} end\u{201d}"),
            ("ÉTÉ", "été"),
            ("the a an", ""),
            ("", ""),
        ] {
            assert_eq!(normalize_answer(text), expected, "{text:?}");
        }
    }

    #[test]
    fn exact_match_is_equality_of_what_counts() {
        assert!(exact_match("The cat.", "cat") && exact_match("", "the") && exact_match("yes", "Yes."));
        assert!(!exact_match("cats", "cat") && !exact_match("cat", "") && !exact_match("cat dog", "dog cat"));
    }

    #[test]
    fn f1_counts_words_as_often_as_both_have_them() {
        for (answer, reference, expected) in [
            ("The cat.", "cat", 1.0),
            ("cat dog", "dog cat", 1.0),
            // Precision 1/4, recall 1/1.
            ("it is a small cat", "cat", 0.4),
            // Precision 1/3, recall 1/2.
            ("no no no", "no yes", 0.4),
            // Precision 2/3, recall 2/4.
            ("Denver Broncos won", "the Denver Broncos of Colorado", 4.0 / 7.0),
            ("cat", "dog", 0.0),
            ("", "", 1.0),
            ("the", "", 1.0),
            ("", "cat", 0.0),
            ("cat", "", 0.0),
        ] {
            let found = f1(answer, reference);
            assert!((found - expected).abs() < 1e-12, "{answer:?} for {reference:?}: {found}, not {expected}");
        }
    }
}
