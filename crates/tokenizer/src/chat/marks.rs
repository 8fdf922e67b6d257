//! Characters that no text of a conversation holds, to find places of the input again in what a template made of it.

/// The noncharacters of Unicode's Arabic block: no text means anything by them, and no template looks for them.
const MARKS: std::ops::RangeInclusive<char> = '\u{FDD0}'..='\u{FDEF}';

/// `N` marks that none of `texts` holds; none where the texts hold nearly all of them.
pub(crate) fn unused<'t, const N: usize>(texts: impl Iterator<Item = &'t str>) -> Option<[char; N]> {
    let mut used = [false; 32];
    for c in texts.flat_map(str::chars).filter(|c| MARKS.contains(c)) {
        used[(c as u32 - *MARKS.start() as u32) as usize] = true;
    }
    let free: Vec<char> = MARKS.zip(used).filter(|(_, used)| !used).map(|(mark, _)| mark).take(N).collect();
    free.try_into().ok()
}

/// `text` without `marks`, and where each of them was in the text that is left, in order.
pub(crate) fn take(text: &str, marks: &[char]) -> (String, Vec<(char, usize)>) {
    let mut plain = String::with_capacity(text.len());
    let mut places = Vec::new();
    for c in text.chars() {
        if marks.contains(&c) { places.push((c, plain.len())) } else { plain.push(c) }
    }
    (plain, places)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_avoid_what_is_there() {
        assert_eq!(unused(["a\u{FDD0}"].into_iter()), Some(['\u{FDD1}', '\u{FDD2}']));
        let all: String = MARKS.collect();
        assert_eq!(unused::<1>([all.as_str()].into_iter()), None);
        assert_eq!(
            take("aé\u{FDD1}b\u{FDD2}", &['\u{FDD1}', '\u{FDD2}']),
            ("aéb".to_string(), vec![('\u{FDD1}', 3), ('\u{FDD2}', 4)])
        );
    }
}
