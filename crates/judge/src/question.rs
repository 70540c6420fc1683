//! What a language model is asked, and how its reply is read.

use minijinja::{Environment, UndefinedBehavior, context};

use crate::{Answer, JudgeError};

/// The template of a question.
#[derive(Debug)]
pub(crate) struct Question {
    environment: Environment<'static>,
}

const NAME: &str = "question";

impl Question {
    /// Checks that the template compiles and shows all that is to be compared.
    pub(crate) fn new(template: &str) -> Result<Self, JudgeError> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment
            .add_template_owned(NAME, template.to_string())
            .map_err(wrong)?;
        let question = Self { environment };
        // Digits, which filters such as `upper` leave alone.
        let probes = ["7310945182", "2648019375", "9153827406"];
        let shown = question.render(probes[0], probes[1], probes[2])?;
        for (variable, probe) in ["prompt", "first", "second"].iter().zip(probes) {
            if !shown.contains(probe) {
                return Err(JudgeError::Template {
                    reason: format!("expected {{{{ {variable} }}}} to be shown, it is not"),
                });
            }
        }
        Ok(question)
    }

    pub(crate) fn render(
        &self,
        prompt: &str,
        first: &str,
        second: &str,
    ) -> Result<String, JudgeError> {
        let template = self.environment.get_template(NAME).map_err(wrong)?;
        template
            .render(context! { prompt, first, second })
            .map_err(wrong)
    }

    /// The verdict in a reply: one of `[[A]]`, `[[B]]` and `[[TIE]]`, as often as it likes, but
    /// not two different ones; or nothing but `A`, `B` or `TIE`.
    pub(crate) fn answer(reply: &str) -> Answer {
        let marks = [
            ("A", "[[A]]", Answer::First),
            ("B", "[[B]]", Answer::Second),
            ("TIE", "[[TIE]]", Answer::Tie),
        ];
        let found: Vec<Answer> = marks
            .iter()
            .filter(|(bare, mark, _)| reply.trim() == *bare || reply.contains(mark))
            .map(|(_, _, answer)| *answer)
            .collect();
        match found[..] {
            [answer] => answer,
            _ => Answer::Unparsed,
        }
    }
}

fn wrong(error: minijinja::Error) -> JudgeError {
    JudgeError::Template {
        reason: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DEFAULT_TEMPLATE;

    #[test]
    fn a_verdict_is_read_and_never_guessed() {
        for (reply, expected) in [
            ("[[A]]", Answer::First),
            ("B is longer, but A is right. [[A]]\n", Answer::First),
            ("[[B]] because. So: [[B]]", Answer::Second),
            (" TIE\n", Answer::Tie),
            ("A", Answer::First),
            ("", Answer::Unparsed),
            ("Answer A is better.", Answer::Unparsed),
            ("[[A]] or perhaps [[B]]", Answer::Unparsed),
            ("[[C]]", Answer::Unparsed),
            ("[A]", Answer::Unparsed),
            ("a", Answer::Unparsed),
        ] {
            assert_eq!(Question::answer(reply), expected, "{reply:?}");
        }
    }

    #[test]
    fn the_default_shows_the_completions_in_their_order_and_unescaped() {
        let question = Question::new(DEFAULT_TEMPLATE).unwrap();
        let text = question.render("1 < 2?", "yes & no", "{{ no }}").unwrap();
        let place = |part: &str| text.find(part).unwrap();
        assert!(place("1 < 2?") < place("yes & no"));
        assert!(place("yes & no") < place("{{ no }}"));
    }

    #[test]
    fn a_template_that_hides_or_invents_something_is_refused() {
        let refused = |template: &str| Question::new(template).unwrap_err().to_string();
        assert!(refused("{{ prompt }} {{ first }}").contains("{{ second }}"));
        assert!(refused("{{ prompt }} {{ first }} {{ second }} {{ third }}").contains("undefined"));
        assert!(refused("{{ prompt").starts_with("judge template: "));
        Question::new("{{ prompt|upper }}: {{ first|trim }} / {{ second }}").unwrap();
    }
}
