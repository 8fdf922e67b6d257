//! Templates that do not compile, do not end, or want more than there is: errors, never a panic or an endless wait.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use std::sync::LazyLock;

use tallow_tokenizer::{ChatOptions, Error, Message, Tokenizer, TrainOptions, train};

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| train(["a b c"], &TrainOptions::default(), |_| {}).unwrap());

fn render(template: &str) -> Result<String, Error> {
    let messages = [Message::new("user", "Hi"), Message::new("assistant", "Yes")];
    TOKENIZER.chat_encoder_with(template)?.render(&messages, &ChatOptions::default())
}

#[test]
fn what_does_not_compile_names_the_line() {
    for (template, line) in [
        ("{{ messages", 1),
        ("a\nb {% for m in messages %}\n", 2),
        ("\n{% endfor %}", 2),
        ("{% generation %}", 1),
        ("\n\n{{ messages | nosuchfilter(}}", 3),
    ] {
        match render(template) {
            Err(Error::TemplateSyntax { line: found, .. }) => assert_eq!(found, line, "{template:?}"),
            other => panic!("{template:?}: {other:?}"),
        }
    }
}

#[test]
fn what_does_not_end_is_stopped() {
    for template in [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% for x in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{{ range(10000000000) | list }}",
        "{% for x in range(100001) %}{% endfor %}",
        "{{ 'x' * 99999999999999 }}",
        "{{ 9 ** 999999999 }}",
        "{{ messages[99].content }}",
        "{{ messages.content.content }}",
        "{{ 1 // 0 }}",
        "{{ nothing() }}",
        "{% include 'chat' %}",
        "{% extends 'x' %}",
        "{{ messages | nosuchfilter }}",
        "{{ messages[0].content.nosuchmethod() }}",
        "{{ messages | tojson(nosuch=1) }}",
        "{{ nothing | tojson }}",
        "{{ raise_exception('never') }}",
        "{{ strftime_now }}{{ strftime_now(1, 2, 3) }}",
    ] {
        assert!(render(template).is_err(), "{template}");
    }
}

#[test]
fn deep_and_large_templates() {
    assert!(render(&format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000))).is_err());
    assert!(render(&format!("{}{}", "{% if true %}".repeat(50_000), "{% endif %}".repeat(50_000))).is_err());
    assert!(render(&format!("{{{{ {} }}}}", "not ".repeat(100_000))).is_err());
    assert!(render(&format!("{{{{ x{} }}}}", "|trim".repeat(100_000))).is_ok());
    let large = format!("{{{{ messages[0].content }}}}{}", "x".repeat((1 << 20) - 40));
    assert!(render(&large).unwrap().starts_with("Hixxx"));
    assert!(matches!(render(&format!("{large}{large}")), Err(Error::TemplateSyntax { .. })));
    let endless = "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}{% for j in range(9) %}\
                   {% set ns.x = [ns.x] %}{% endfor %}{% endfor %}";
    assert_eq!(render(endless).unwrap(), "");
    assert_eq!(render(&"{% set x = [x] %}".repeat(50_000)).unwrap(), "");
    assert!(render(&format!("{}{}", "{% if x %}{% elif x %}", "{% elif x %}".repeat(50_000))).is_err());
    let nested = "{% set ns = namespace(x=[]) %}{% for i in range(2000) %}{% set ns.x = [ns.x] %}{% endfor %}";
    assert!(render(&format!("{nested}{{{{ ns.x }}}}")).is_err());
    assert!(render(&format!("{nested}{{{{ ns.x | tojson }}}}")).is_err());
}

#[test]
fn odd_but_valid_templates() {
    assert_eq!(render("{{ nothing }}{% for x in nothing %}{% endfor %}{{ nothing is defined }}").unwrap(), "False");
    assert_eq!(render("{{ strftime_now('') }}{{ messages[0]['nothing'] }}").unwrap(), "");
    assert_eq!(render("{{ 'a'.count('') }}{{ messages[5:] }}").unwrap(), "2[]");
}
