//! The roles and fields that a chat template names.

use tallow_data::KnownWords;

/// What `template` (Jinja) names: in tags that speak of roles every quoted word is a role; every quoted word and every
/// attribute is a field that a message may have.
pub(super) fn named_in(template: &str) -> KnownWords {
    let mut words = KnownWords::default();
    for tag in tags(template) {
        let quoted = quoted(tag);
        if tag.contains("role") {
            words
                .roles
                .extend(quoted.iter().filter(|word| !["role", "content"].contains(word)).map(ToString::to_string));
        }
        words.message_fields.extend(quoted.iter().chain(&attributes(tag)).map(ToString::to_string));
    }
    for list in [&mut words.roles, &mut words.message_fields] {
        list.sort();
        list.dedup();
    }
    words
}

/// The insides of `{% %}` and `{{ }}`.
fn tags(template: &str) -> Vec<&str> {
    let (mut found, mut rest) = (vec![], template);
    while let Some(start) = [rest.find("{%"), rest.find("{{")].into_iter().flatten().min() {
        let end = if rest[start..].starts_with("{%") { "%}" } else { "}}" };
        let inner = &rest[start + 2..];
        let Some(len) = inner.find(end) else { break };
        found.push(&inner[..len]);
        rest = &inner[len + 2..];
    }
    found
}

fn is_word(text: &str) -> bool {
    let letter = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    !text.is_empty() && text.len() <= 40 && text.chars().all(letter)
}

fn quoted(tag: &str) -> Vec<&str> {
    let (mut found, mut rest) = (vec![], tag);
    while let Some(start) = rest.find(['\'', '"']) {
        let (quote, inner) = rest[start..].split_at(1);
        let Some(end) = inner.find(quote) else { break };
        found.extend(Some(&inner[..end]).filter(|word| is_word(word)));
        rest = &inner[end + 1..];
    }
    found
}

fn attributes(tag: &str) -> Vec<&str> {
    let name = |part: &'_ str| part.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(part.len());
    tag.split('.').skip(1).map(|part| &part[..name(part)]).filter(|word| is_word(word)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_and_fields_are_those_that_the_template_names() {
        let template = "{% for m in messages %}{% if m['role'] == 'critic' or m.role in [\"ipython\"] %}\
                        {{ '<|im_start|>' + m['role'] + m.mood }}{% elif x == 'nobody' %}{{ m[\"aside\"] }}{% endif %}{% endfor %}";
        let KnownWords { roles, message_fields } = named_in(template);
        assert_eq!(roles, ["critic", "ipython"]);
        for field in ["mood", "aside", "role"] {
            assert!(message_fields.iter().any(|name| name == field), "{field} in {message_fields:?}");
        }
        assert_eq!(named_in("{{ 'unclosed"), KnownWords::default());
    }
}
